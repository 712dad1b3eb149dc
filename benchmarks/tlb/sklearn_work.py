"""A model of tabular data that is fitted and asked, in one process: sklearn_work.py LOOPS MARKS.
Each pair of time.process_time() calls encloses LOOPS such rounds."""

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
import numpy as np
from marks import measure
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

ROWS = 2_000
numbers = np.random.default_rng(1)
measures = numbers.normal(size=(ROWS, 10))
table = np.hstack([measures, numbers.integers(0, 12, (ROWS, 2))])
answers = (measures[:, :3].sum(axis=1) + numbers.normal(size=ROWS) > 0).astype(int)


def model(last):
    columns = ColumnTransformer([
        ("numbers", StandardScaler(), list(range(10))),
        ("kinds", OneHotEncoder(handle_unknown="ignore"), [10, 11]),
    ])  # fmt: skip
    return make_pipeline(columns, last)


forest = model(RandomForestClassifier(n_estimators=10, max_depth=8, random_state=1))
forest.fit(table, answers)


def visit(number):
    """Fit a small model on a part of the table; ask it, and the forest, for another part."""
    start = number * 37 % 1000
    seen, asked = slice(start, start + 400), slice(start + 400, start + 600)
    linear = model(LogisticRegression(max_iter=50)).fit(table[seen], answers[seen])
    for one in (linear, forest):
        right = (one.predict_proba(table[asked])[:, 1] > 0.5) == answers[asked]
        assert right.mean() > 0.65


measure(visit, warm=5)
