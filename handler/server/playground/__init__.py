"""The playground: a page where people make pictures, and look at the worker that makes them."""
