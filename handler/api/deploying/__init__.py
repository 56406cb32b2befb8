"""What deploys a model to a platform: the choices, whether one can work, its commands and files."""
