import llmrec

rec = llmrec.fit("train.csv", "products.csv", budget="1m")
rec.recommend(k=10).write_csv("lists.csv")
