"""How the embedded model `spark` is made and judged: a real, tiny FLUX.1 pipeline trained from nothing on a CPU.

    scenes.py        what can be drawn: pictures and captions from one value, held-out splits
    checker.py       the judge: what is on a picture
    measures.py      how well it is drawn: shape, edges, flat areas
    text.py          tokenizers, CLIP and T5, trained to understand captions
    autoencoder.py   pixels <-> latents, trained on drawn pictures
    flow.py          the FLUX transformer, the noise it starts from, the steps in which it draws
    latents.py       pictures of every size, drawn and encoded ahead
    training.py      the transformer's training by rectified flow, in lessons
    validation.py    what steers it
    drawings.py      what the transformer draws, and the scene that each drawing comes nearest to
    polish.py        the decoder, trained on these
    progress.py      a stage's budget of time, kept every five minutes
    journal.py       the training log
    outlined.py      scenes with outlines
    lora.py          a LoRA for it, trained in minutes: outlined shapes
    train.py         the one command that runs it all and writes handler/weights/spark

The product never imports this package; it loads the finished weights as it loads any FLUX model.
"""
