"""lm-evaluation-harness: an adapter (`model.TwoTowerLM`), and the published table's tasks by name (`tasks.TASKS`)."""
