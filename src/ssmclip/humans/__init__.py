"""The experiment of Geirhos et al. 2021 (arXiv:2106.07411): models compared with people out of distribution."""

RESAMPLES = 1000  # of the bootstrap, where nothing else is asked for
