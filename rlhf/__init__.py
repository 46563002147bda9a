"""Learning: the recipe, the pipeline, the learner, the losses, the actor graph and the command line.

    roundhouse run recipes/quickstart.yaml

`rlhf` knows models and losses. How text becomes tokens is `data`'s business, how machines are found is `cluster`'s.
"""
