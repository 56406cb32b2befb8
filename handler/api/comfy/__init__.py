"""ComfyUI's jobs: prompts that wait and are drawn, what is told of them meanwhile, and what is kept of them after."""
