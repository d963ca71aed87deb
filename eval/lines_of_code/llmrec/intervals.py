import llmrec

rec = llmrec.fit("train.csv", model="ease")
print(rec.evaluate("test.csv"))
