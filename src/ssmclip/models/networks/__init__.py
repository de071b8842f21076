"""The networks, each a timm model or an open_clip text tower."""

# Before any network, so that whoever imports one, in whatever thread, takes timm's import lock first: at the end of
# its import timm is told of the networks (`ssmclip.models.plugins`), and would otherwise wait for half of one.
import timm  # noqa: F401
