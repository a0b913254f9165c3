"""lm-evaluation-harness: the adapter (`model.TwoTowerLM`), and the tasks of the published table (`tasks.TASKS`)."""
