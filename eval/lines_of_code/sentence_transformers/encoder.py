import pandas as pd
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss

names = pd.read_csv("products.csv").set_index("product_id")["name"]
train = pd.read_csv("train.csv").sort_values("ordered_at")
train = train.assign(anchor=train["product_id"].map(names))
train["positive"] = train.groupby("customer_id")["anchor"].shift(-1)
pairs = Dataset.from_pandas(train[["anchor", "positive"]].dropna(), preserve_index=False)
model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
arguments = SentenceTransformerTrainingArguments("checkpoints", num_train_epochs=1, per_device_train_batch_size=64)
SentenceTransformerTrainer(model, arguments, pairs, loss=MultipleNegativesRankingLoss(model)).train()
model.save("encoder")
