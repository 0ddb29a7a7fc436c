"""Step reports in, findings out: pure rules over a bounded history, one table row each."""
