"""How a graph becomes a plan and stages: one pass per file, in the order of the picture in the design."""

if __name__ == "passes":
    raise ImportError("import autodecouple.passes, not passes: this folder would load as a second copy of it")
