"""Model families: a config.json becomes a tree of modules and a step program. A family, a file."""
