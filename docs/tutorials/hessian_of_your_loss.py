# %% [markdown]
# # The Hessian of your own loss
#
# The eigenvalues of the Hessian say how sharply a loss bends around the weights. `ssmclip.hessian_eigenvalues` finds
# the extreme ones without ever forming the matrix: it needs a function that returns the loss, and the parameters it
# depends on. Both losses here have a Hessian that is known otherwise, so that every number is checked.
#
# For a CLIP and its training data there is a command:
#
# ```sh
# ssmclip analyze hessian --model runs/mine --data PAIRS.parquet --batches 60 --out hessian.jsonl
# ```

# %%
import numpy as np
import torch
from torch import nn

import ssmclip

torch.manual_seed(0)
x, y = torch.randn(200, 30, dtype=torch.float64), (torch.rand(200) < 0.5).double()

# %% [markdown]
# ## Logistic regression
#
# Its Hessian has a formula, `X.T diag(p (1 - p)) X / n`.

# %%
weights = torch.randn(30, dtype=torch.float64, requires_grad=True)
spectrum = ssmclip.hessian_eigenvalues(
    lambda: nn.functional.binary_cross_entropy_with_logits(x @ weights, y), [weights], k=3, tol=1e-8
)
p = torch.sigmoid(x @ weights).detach()
known = np.linalg.eigvalsh((x.T @ ((p * (1 - p))[:, None] * x) / len(x)).numpy())
print("largest eigenvalues:", [round(value, 5) for value in spectrum.largest.tolist()])
np.testing.assert_allclose(spectrum.largest, known[::-1][:3], rtol=1e-7)
np.testing.assert_allclose(spectrum.smallest, known[:3], rtol=1e-7)
assert spectrum.converged.largest.all()

# %% [markdown]
# ## A network
#
# Give the module itself as the parameters. Such a loss has directions of negative curvature, too.

# %%
network = nn.Sequential(nn.Linear(30, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def loss():
    return nn.functional.mse_loss(network(x).squeeze(1), y)


spectrum = ssmclip.hessian_eigenvalues(loss, network, k=2, tol=1e-6)
print(f"largest {spectrum.largest[0]:.4f}, most negative {spectrum.smallest[0]:.4f}, {spectrum.products} products")

# %% [markdown]
# A network this small has a Hessian that PyTorch can write down whole. Its eigenvalues are the same; but the search
# needed far fewer products than there are parameters, which is what makes it possible for millions of them.

# %%
names = [name for name, _ in network.named_parameters()]
sizes = [p.numel() for p in network.parameters()]


def of_vector(vector):
    """Return the loss as a function of one vector that holds all parameters."""
    parts = vector.split(sizes)
    shaped = {n: v.view_as(p) for n, v, p in zip(names, parts, network.parameters(), strict=True)}
    return nn.functional.mse_loss(torch.func.functional_call(network, shaped, x).squeeze(1), y)


dense = torch.autograd.functional.hessian(of_vector, nn.utils.parameters_to_vector(network.parameters()).detach())
known = np.linalg.eigvalsh(dense.numpy())
np.testing.assert_allclose(spectrum.largest, known[::-1][:2], rtol=1e-5)
np.testing.assert_allclose(spectrum.smallest, known[:2], rtol=1e-5)
assert known[0] < 0
assert spectrum.products < spectrum.size

# %% [markdown]
# ## From here
#
# - [Commands](../commands.md#cost-and-loss-surface): spectra and loss surfaces of CLIP models, as rows and figures.
# - [Results](../results.md#loss-surface): what was found for a state-space tower and a ViT.
