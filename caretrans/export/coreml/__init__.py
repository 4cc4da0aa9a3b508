"""Core ML: conversion, evaluation of its programs on any system, and measurements on a Mac."""
