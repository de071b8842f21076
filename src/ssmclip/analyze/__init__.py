"""Model x data -> rows: the loss landscape, by Hessian-vector products through every encoder."""
