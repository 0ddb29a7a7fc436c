"""Where a run's numbers go: JSONL always, a live view, mirrors as extras."""
