llmrec init train.csv --items products.csv --name shop
llmrec tune-encoder shop.yaml --out encoder
