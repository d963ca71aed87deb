import pandas as pd
from sentence_transformers import SentenceTransformer, util

train, products = pd.read_csv("train.csv"), pd.read_csv("products.csv")
model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
vectors = pd.DataFrame(model.encode(products["name"].tolist()), index=products["product_id"])
users = train.join(vectors, on="product_id").groupby("customer_id")[vectors.columns.tolist()].mean()
new = vectors.loc[~vectors.index.isin(train["product_id"])]
rows = []
for user, hits in zip(users.index, util.semantic_search(users.to_numpy("float32"), new.to_numpy("float32"), top_k=10)):
    rows += [(user, new.index[hit["corpus_id"]], rank, hit["score"]) for rank, hit in enumerate(hits, start=1)]
pd.DataFrame(rows, columns=["user_id", "item_id", "rank", "score"]).to_csv("lists.csv", index=False)
