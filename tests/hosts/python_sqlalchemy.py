"""SQLAlchemy, on Python's own SQLite: the extension is loaded before the first connection."""

import sqlite3

from sqlalchemy import Column, Integer, String, create_engine, func, select, text
from sqlalchemy.orm import Session, declarative_base

loader = sqlite3.connect(":memory:")
loader.enable_load_extension(True)
loader.load_extension("./libdurovfs")

engine = create_engine("sqlite:///app.db")
Base = declarative_base()


class Note(Base):
    __tablename__ = "notes"
    id = Column(Integer, primary_key=True)
    text = Column(String)


Base.metadata.create_all(engine)
for number in range(1, 11):
    with Session(engine) as session:
        session.add(Note(text="note %d" % number))
        session.commit()
engine.dispose()

with Session(engine) as session:
    print(session.scalar(select(func.count()).select_from(Note)))
    print(session.scalar(text("SELECT durovfs_status()")))
    print(session.scalar(text("SELECT durovfs_bookmark()")))
