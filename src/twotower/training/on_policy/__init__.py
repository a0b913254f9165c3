"""On-policy training: the model of a step decodes prompts, and its own states are trained towards the AR model.

Training on a model's own outputs: GKD (Agarwal et al. 2023, arXiv 2306.13649). Replaying what verification rejected:
Online Speculative Decoding (Liu et al. 2023, arXiv 2310.07177).

`rollouts` decodes and picks states, `states` packs them into rows, `stage` stores them in the run.
"""
