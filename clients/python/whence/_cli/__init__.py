"""The ``whence`` command, by what is asked; needs the extra ``cli``."""
