"""Numbers from scores, their intervals and paired tests."""
