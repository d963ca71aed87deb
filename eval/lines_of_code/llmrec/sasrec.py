import llmrec

rec = llmrec.fit("train.csv", model="sasrec")
rec.recommend(k=10).write_csv("lists.csv")
