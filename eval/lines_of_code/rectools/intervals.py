import pandas as pd
from rectools.dataset import Dataset
from rectools.metrics import NDCG, Recall
from rectools.models import EASEModel
from scipy.stats import bootstrap

COLUMNS = {"customer_id": "user_id", "product_id": "item_id", "ordered_at": "datetime"}

train, test = (pd.read_csv(f"{part}.csv").rename(columns=COLUMNS).assign(weight=1) for part in ("train", "test"))
dataset = Dataset.construct(train)
model = EASEModel().fit(dataset)
lists = model.recommend(users=test["user_id"].unique(), dataset=dataset, k=10, filter_viewed=True)
for name, metric in {"NDCG@10": NDCG(k=10), "Recall@10": Recall(k=10)}.items():
    values = metric.calc_per_user(lists, test)
    interval = bootstrap((values,), lambda sample, axis: sample.mean(axis=axis)).confidence_interval
    print(f"{name} {values.mean():.4f} [{interval.low:.4f}, {interval.high:.4f}]")
