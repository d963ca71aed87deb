import llmrec

rec = llmrec.fit("train.csv", "products.csv", model="smollm2-lora")
rec.save("model")
