"""Pictures found by texts."""
