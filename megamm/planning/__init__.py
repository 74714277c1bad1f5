"""From a fitted law and a budget to a plan: what to train, where, for how long, at what cost."""
