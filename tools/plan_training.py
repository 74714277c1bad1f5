#!/usr/bin/env python
"""Plan a training run from fitted scaling laws and a budget: plan.json, plan.md and train.yaml."""

from megamm.commands.plan_training import command

if __name__ == "__main__":
    command()
