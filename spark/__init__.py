"""How the embedded model `spark` is made and judged: a real, tiny FLUX.1 pipeline trained from nothing on a CPU.

    scenes.py        what can be drawn: pictures and captions from one value, held-out splits
    checker.py       the judge
    text.py          tokenizers, CLIP and T5, trained to understand captions
    autoencoder.py   pixels <-> latents, trained on drawn pictures
    flow.py          the FLUX transformer, trained by rectified flow
    lora.py          a LoRA for it, trained in minutes: outlined shapes
    train.py         the one command that runs it all and writes handler/weights/spark

The product never imports this package; it loads the finished weights as it loads any FLUX model.
"""
