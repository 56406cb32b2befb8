"""The queue, and the one thread that owns the worker: who may wait, what is drawn together, what a failure means."""
