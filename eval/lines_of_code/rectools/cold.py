import pandas as pd
from lightfm import LightFM
from rectools.dataset import Dataset
from rectools.models import LightFMWrapperModel

COLUMNS = {"customer_id": "user_id", "product_id": "item_id", "ordered_at": "datetime"}

train = pd.read_csv("train.csv").rename(columns=COLUMNS).assign(weight=1)
products = pd.read_csv("products.csv")
words = products.assign(value=products["name"].str.lower().str.split()).explode("value")
features = words[["product_id", "value"]].set_axis(["id", "value"], axis=1).assign(feature="word")
dataset = Dataset.construct(train, item_features_df=features, cat_item_features=["word"])
model = LightFMWrapperModel(LightFM(no_components=32, loss="warp"), epochs=50).fit(dataset)
new = products.loc[~products["product_id"].isin(train["item_id"]), "product_id"]
lists = model.recommend(train["user_id"].unique(), dataset, k=10, filter_viewed=True, items_to_recommend=new)
lists.to_csv("lists.csv", index=False)
