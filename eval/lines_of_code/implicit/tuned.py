import numpy as np
import pandas as pd
from implicit.als import AlternatingLeastSquares
from implicit.evaluation import leave_k_out_split, ndcg_at_k
from scipy.sparse import csr_matrix

train = pd.read_csv("train.csv")
users, items = train["customer_id"].astype("category"), train["product_id"].astype("category")
matrix = csr_matrix((np.ones(len(train)), (users.cat.codes, items.cat.codes)))
fitted, held = leave_k_out_split(matrix, K=1, random_state=0)
grid = [dict(factors=n, regularization=r, alpha=a) for n in (8, 16, 32) for r in (0.01, 0.1, 1) for a in (1, 10)]
scores = []
for parameters in grid:
    model = AlternatingLeastSquares(**parameters, random_state=0)
    model.fit(fitted)
    scores.append(ndcg_at_k(model, fitted, held, K=10))
model = AlternatingLeastSquares(**grid[np.argmax(scores)], random_state=0)
model.fit(matrix)
ids, values = model.recommend(np.arange(matrix.shape[0]), matrix, N=10)
lists = pd.DataFrame({"user_id": np.repeat(users.cat.categories, 10), "item_id": items.cat.categories[ids.ravel()]})
lists.assign(rank=np.tile(np.arange(1, 11), len(ids)), score=values.ravel()).to_csv("lists.csv", index=False)
