import numpy as np
import pandas as pd
from rectools.dataset import Dataset
from rectools.metrics import NDCG
from rectools.models import EASEModel, PopularModel
from scipy.stats import bootstrap, permutation_test

COLUMNS = {"customer_id": "user_id", "product_id": "item_id", "ordered_at": "datetime"}

train, test = (pd.read_csv(f"{part}.csv").rename(columns=COLUMNS).assign(weight=1) for part in ("train", "test"))
dataset = Dataset.construct(train)
users = test["user_id"].unique()
ease, popularity = (
    NDCG(k=10).calc_per_user(model.fit(dataset).recommend(users, dataset, k=10, filter_viewed=True), test)
    for model in (EASEModel(), PopularModel())
)
difference = (ease - popularity).to_numpy()
interval = bootstrap((difference,), np.mean).confidence_interval
p = permutation_test((difference,), np.mean, permutation_type="samples").pvalue
print(f"EASE - popularity: NDCG@10 {difference.mean():+.4f} [{interval.low:+.4f}, {interval.high:+.4f}], p {p:.4f}")
