import sqlite3

import pandas as pd
from rectools.dataset import Dataset
from rectools.models import EASEModel

COLUMNS = {"customer_id": "user_id", "product_id": "item_id", "ordered_at": "datetime"}

train = pd.read_csv("train.csv").rename(columns=COLUMNS).assign(weight=1)
dataset = Dataset.construct(train)
model = EASEModel().fit(dataset)
lists = model.recommend(users=train["user_id"].unique(), dataset=dataset, k=10, filter_viewed=True)
lists.to_parquet("lists.parquet")
lists.to_sql("recommendations", sqlite3.connect("lists.db"), index=False)
