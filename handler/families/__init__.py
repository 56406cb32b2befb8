"""What a model family is: a module with three functions and a name, itself named by string in the catalogue.

    build(reader, hardware)             -> pipeline   diffusers' own pipeline around `weights.load_components`
    encode(pipeline, recipe, tokens)    -> prompt     whatever `run` needs of the text; made once for n pictures
    run(pipeline, prompt, recipe, ...)  -> uint8 (height, width, 3) array of exactly `recipe.size`
    DENOISER                            the pipeline's component whose repeated blocks are compiled

Families call diffusers' pipelines and never rewrite their denoising loops. `run` calls `on_step(done)` after
each step; an exception raised there ends the run. A picture with NaN, or black all over, is a NumericalError.
"""


def quiet() -> None:
    """Silence the libraries' progress bars and advice; errors still show. Called before a family is imported."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (transformers.utils.logging, diffusers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
