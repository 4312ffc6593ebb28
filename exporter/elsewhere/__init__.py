"""Building and measuring on another host: a kit that takes everything along, and results that come back.

`kit` writes the folder, `host` is what runs on the other machine (without torch and diffusers), `merged` takes the
results into the run's report as columns of their own.
"""
