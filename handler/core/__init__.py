"""The words everyone speaks: errors, settings, a request, a recipe, the version."""
