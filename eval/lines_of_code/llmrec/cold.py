import polars as pl

import llmrec

new = pl.read_csv("products.csv").join(pl.read_csv("train.csv"), on="product_id", how="anti")["product_id"].to_list()
rec = llmrec.fit("train.csv", "products.csv", model=llmrec.baselines.Content(encoder="all-MiniLM-L6-v2"))
requests = pl.DataFrame({"user_id": rec.users, "candidates": [new] * len(rec.users)})
rec.recommend(requests, k=10).write_csv("lists.csv")
