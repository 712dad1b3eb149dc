"""The heap on huge pages: arenas, malloc's heap, large blocks; and freezing it before forks.

driver.py is what apply.py calls; arenas.py and malloc.py say what is there and what takes part;
chunks.py looks at pages and collapses; refusal.py says where nothing is done; freeze.py is for
forks, advice.py for the doctor.
"""
