"""The page that ``alignkd report`` writes: facts of runs and evaluations, charts and their layout."""
