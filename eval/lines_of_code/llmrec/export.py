import llmrec

llmrec.fit("train.csv", model="ease").save("shop")
