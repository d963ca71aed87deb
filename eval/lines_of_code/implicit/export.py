import sqlite3

import numpy as np
import pandas as pd
from implicit.als import AlternatingLeastSquares
from scipy.sparse import csr_matrix

train = pd.read_csv("train.csv")
users, items = train["customer_id"].astype("category"), train["product_id"].astype("category")
matrix = csr_matrix((np.ones(len(train)), (users.cat.codes, items.cat.codes)))
model = AlternatingLeastSquares(factors=32, random_state=0)
model.fit(matrix)
ids, scores = model.recommend(np.arange(matrix.shape[0]), matrix, N=10)
lists = pd.DataFrame({"user_id": np.repeat(users.cat.categories, 10), "item_id": items.cat.categories[ids.ravel()]})
lists = lists.assign(rank=np.tile(np.arange(1, 11), len(ids)), score=scores.ravel())
lists.to_parquet("lists.parquet")
lists.to_sql("recommendations", sqlite3.connect("lists.db"), index=False)
