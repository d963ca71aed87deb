python -c 'import llmrec; llmrec.fit("train.csv", "products.csv", model="ease").save("shop")'
llmrec serve shop --port "$PORT"
