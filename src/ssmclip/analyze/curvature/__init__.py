"""The loss around a model: Hessian spectra and loss surfaces."""
