import llmrec

ease = llmrec.fit("train.csv", model="ease")
popularity = llmrec.fit("train.csv", model="popularity")
print(llmrec.compare(ease, popularity, "test.csv"))
