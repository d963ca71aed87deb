import pandas as pd
from rectools.dataset import Dataset
from rectools.models import PopularModel

COLUMNS = {"customer_id": "user_id", "product_id": "item_id", "ordered_at": "datetime"}

train = pd.read_csv("train.csv").rename(columns=COLUMNS).assign(weight=1)
dataset = Dataset.construct(train)
model = PopularModel().fit(dataset)
lists = model.recommend(users=train["user_id"].unique(), dataset=dataset, k=10, filter_viewed=True)
lists.to_csv("lists.csv", index=False)
