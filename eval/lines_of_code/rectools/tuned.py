import pandas as pd
from rectools.dataset import Dataset
from rectools.metrics import NDCG
from rectools.model_selection import LastNSplitter, cross_validate
from rectools.models import EASEModel

COLUMNS = {"customer_id": "user_id", "product_id": "item_id", "ordered_at": "datetime"}

train = pd.read_csv("train.csv").rename(columns=COLUMNS).assign(weight=1)
dataset = Dataset.construct(train)
models = {value: EASEModel(regularization=value) for value in (1, 3, 10, 30, 100, 300, 1000)}
validated = cross_validate(
    dataset, LastNSplitter(n=1), metrics={"NDCG": NDCG(k=10)}, models=models, k=10, filter_viewed=True
)
best = pd.DataFrame(validated["metrics"]).set_index("model")["NDCG"].idxmax()
model = models[best].fit(dataset)
lists = model.recommend(users=train["user_id"].unique(), dataset=dataset, k=10, filter_viewed=True)
lists.to_csv("lists.csv", index=False)
