import llmrec

rec = llmrec.fit("train.csv", model="popularity")
rec.recommend(k=10).write_csv("lists.csv")
