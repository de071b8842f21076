"""The experiment of Geirhos et al. 2021 (arXiv:2106.07411): models beside people out of distribution."""
