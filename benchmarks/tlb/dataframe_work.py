"""Reports from tables with pandas and DuckDB, in one process: dataframe_work.py LOOPS MARKS. Each
pair of time.process_time() calls encloses LOOPS reports."""

import json
import os
import sys

sys.modules["pyarrow"] = None  # which pandas loads where it is installed
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
import duckdb  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from marks import measure  # noqa: E402

ROWS = 10_000
numbers = np.random.default_rng(1)
orders = pd.DataFrame({
    "id": np.arange(ROWS),
    "day": pd.Timestamp("2026-01-01") + pd.to_timedelta(numbers.integers(0, 300, ROWS), unit="D"),
    "shop": numbers.integers(0, 40, ROWS),
    "product": numbers.integers(0, 200, ROWS),
    "amount": numbers.integers(1, 10, ROWS),
})  # fmt: skip
products = pd.DataFrame({
    "product": np.arange(200),
    "name": [f"product {n}" for n in range(200)],
    "price": numbers.random(200).round(2) * 100,
})  # fmt: skip
# No other thread: when it ran would differ from run to run.
base = duckdb.connect(config={"threads": 1, "async_threads": 0})
base.execute("CREATE TABLE orders AS SELECT * FROM orders")
base.execute("CREATE TABLE products AS SELECT * FROM products")


def best_sold(since):
    """By DuckDB: a join, an aggregate, the first twenty; then pandas on what it gave."""
    found = base.execute(
        "SELECT name, sum(amount * price) AS turnover, count(*) AS orders FROM orders "
        "JOIN products USING (product) WHERE day >= ? GROUP BY name ORDER BY turnover DESC "
        "LIMIT 20", [since],
    ).df()  # fmt: skip
    found["share"] = found["turnover"] / found["turnover"].sum()
    found["name"] = found["name"].str.title()
    return found


def by_shop(shop):
    """By pandas: a filter, a merge, two ways to group."""
    its = orders[orders["shop"] == shop].merge(products, on="product")
    its["turnover"] = its["amount"] * its["price"]
    by_month = its.groupby(its["day"].dt.month)["turnover"].agg(["sum", "mean", "count"])
    return by_month.join(its.pivot_table(index=its["day"].dt.month, values="amount", aggfunc="max"))


def visit(number):
    best = best_sold(pd.Timestamp("2026-01-01") + pd.Timedelta(days=number * 7 % 250))
    assert json.loads(best.to_json(orient="records"))[0]["turnover"] > 0
    assert len(by_shop(number * 11 % 40).round(2).to_dict(orient="index")) == 10


measure(visit, warm=10)
