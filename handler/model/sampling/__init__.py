"""ComfyUI's sampling: what its names mean in numbers, and how diffusers' pipelines draw by it.

`curves` has how noise and timesteps belong together, `schedules` which noise the steps have, `samplers` the steps
themselves, `noise` what they add, `scheduler` all of that behind diffusers' interface, `latents` what it begins with.
Reached late: importing these imports torch.
"""
